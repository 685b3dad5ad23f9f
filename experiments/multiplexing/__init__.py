"""When it pays to turn devices from rollout to training and back: a simulator and its inputs."""
