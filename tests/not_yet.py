"""What reading by torch.export does not do yet, by the beginning of a test: these may fail, all others must not."""

NOT_YET = () and (
    "test_cli.py::",
    "test_compile.py::",
    "test_examples.py::",
    "test_faults.py::test_interruption_at_any_call_leaves_all_as_before_or_the_estimate_whole[",
    "test_interrupts.py::",
    "test_local.py::test_an_example_settles_alone_as_among_others[",
    "test_memory.py::",
    "test_profile.py::",
    "test_public_models.py::",
    "test_settling.py::",
    "test_sound_reading.py::",
    "test_sound_training.py::",
    "test_speed.py::",
    "test_stiffness.py::",
    "test_study.py::",
    "test_sweep.py::",
    "test_traps.py::",
    "test_verify.py::",
    "test_zoo.py::",
)
