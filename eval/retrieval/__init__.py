"""What vectors find: landmarks, copies, images of the same class, near duplicates."""
