"""Settings that every test runs under; set before jax is imported."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The parity tests place one program on 8 devices; all other tests use the first of them.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
