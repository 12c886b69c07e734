"""What pushing an attribute does and costs over denoising: sensitivity and KL by slice of progress."""
