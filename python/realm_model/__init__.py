"""A small, whole REALM on the ops of realm_kernels: world, model, pre-training with a refreshed index,
evaluation.
"""
