"""The two questions answered with controls: are features monosemantic, and are they held in superposition."""
