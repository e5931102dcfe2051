"""Weights from the learner to the generators. May import: the library.

A version of the weights is one stream of bytes, a safetensors file (``stream.py``). A backend is a road that this
stream takes; each is a module with the same three parts (``backend.py`` names them):

- ``Publisher(settings).publish(source, version)``: on every learner rank; rank 0's answer travels to the generators.
- ``update_info(info, version, node)``: in the generator, before the engine pauses; what its workers are told.
- ``receive(update, device, rank)``: in the engine's worker, while it is paused; the tensors by name.
"""
