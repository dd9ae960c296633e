"""What keeps a long run whole: checkpoints that survive, processes that agree, faults that are seen and named."""
