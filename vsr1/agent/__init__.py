"""The agent: what is said to the policy (protocol), how it answers (generate), and the loop around both (rollout)."""
