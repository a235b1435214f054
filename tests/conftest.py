from __future__ import annotations

import torch

# The networks of the tests are so small that threads only wait for each other.
torch.set_num_threads(1)
