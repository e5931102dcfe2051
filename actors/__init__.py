"""Ray actors around the library. An actor imports the library, never another actor.

Modules here run in actor processes: ``ledger``, ``generator``, ``verifier``, ``learner`` with ``learner_rank`` and
``deepspeed_engine``. ``weights`` moves weights, ``cluster`` starts and joins actors, ``commands`` is the command line.
"""
