"""Methods that leave smaller dense matrices: fewer layers, narrower ones, or fewer channels."""
