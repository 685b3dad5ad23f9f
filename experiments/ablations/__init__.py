"""What the two ablation programs share: chained tasks, a tiny policy, its learner, cells."""
