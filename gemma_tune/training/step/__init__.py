"""The training and evaluation steps, compiled as one program or as one for each kind of decoder block."""
