"""What runs the stages: the command line, project scaffolding, the demo, progress."""
