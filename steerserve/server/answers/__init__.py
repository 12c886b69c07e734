"""What is sent back: whole answers and the views of a stream."""
