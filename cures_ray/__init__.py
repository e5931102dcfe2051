"""The library: algorithm, data, verdicts, losses and the training loop. No Ray, vLLM or DeepSpeed.

Leaves that every room may import: ``messages`` (what parts exchange), ``config`` (settings; its sections are in
``config_sections``, ``config_data`` and ``config_curriculum``), ``config_load`` (settings from files), ``snapshot``
(arrays on disk), ``boxes`` (where an answer stands in a text). The rooms are the sub-packages; each says what it
promises and what it may import.
"""
