"""What a pretrained run is worth on new data."""
