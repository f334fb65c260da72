"""What several tests share: scratch places, simulated power loss, workloads, a daemon under test."""
