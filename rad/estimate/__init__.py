"""What a study will cost before it is run: tokens, FLOPs, memory, disk, GPU-hours. No torch."""
