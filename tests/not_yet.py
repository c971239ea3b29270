"""What reading by torch.export does not do yet, by the beginning of a test: these may fail, all others must not."""

NOT_YET = (
    "test_faults.py::test_interruption_at_any_call_leaves_all_as_before_or_the_estimate_whole[",
    "test_local.py::test_an_example_settles_alone_as_among_others[",
    "test_memory.py::test_a_sweep_holds_three_numbers_a_unit[",
    "test_sound_training.py::",
    "test_public_models.py::",
)
