"""What every other package stands on: errors, recipes, device, randomness, atomic files, signals."""
