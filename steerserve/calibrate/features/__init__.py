"""What a class of texts activates: statistics by layer, the features chosen from them, and when these form."""
