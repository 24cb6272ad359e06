"""moeconv: convert Mixture-of-Experts checkpoints, file to file."""

__version__ = "0.1.0"
