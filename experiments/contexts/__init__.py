"""Long tasks, context engineering off and on: `experiments.context`."""
