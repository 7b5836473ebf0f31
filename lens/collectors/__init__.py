"""What runs on the host beside the training: the agent, its spool and shipper, and the collectors it polls.

Read `protocol` first, then `agent`. Nothing here imports the hooks, numpy, pyarrow or torch.
"""
