"""What the machine grants: cores, GPUs, memory, and an MPI launcher."""
