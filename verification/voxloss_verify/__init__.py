"""The property-based verification suite, the demo and the command line."""
