"""What a checkpoint holds, where it lies, how it is written beside training, and how a run resumes from it."""
