"""What bits cost and where they matter: sizes and operations, sensitivity, bits under a budget, oscillating weights."""
