"""What the machine grants, and what of it is free: cores, GPUs, memory, the MPI launcher."""
