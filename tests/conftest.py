"""Settings of every test, and where the tests run: `pytest --device`."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before anything imports the hub's client: it asks again and again where there is no network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

try:
    from hypothesis import settings
except ImportError:
    pass  # the tests that need it are skipped
else:
    settings.register_profile("embattle", deadline=None, derandomize=True, print_blob=True)
    settings.load_profile("embattle")

# What does not run on another device than the CPU, and why: files, or tests of them with all their
# parameters.
_EMULATOR = "the emulator runs on the CPU"
_PACKAGE = "the package makes its tensors, on the CPU"
_RANKS = "two processes that meet through gloo, on the CPU"
ON_THE_CPU_ALONE = {
    "test_audit_command.py": _PACKAGE,
    "test_audit.py::test_samples_leave_and_known_ones_are_left_alone": _PACKAGE,
    "test_audit.py::test_the_smallest_radii_give_the_whole_curve": _PACKAGE,
    "test_build.py": "reads object files",
    "test_certified_fakes.py": _PACKAGE,
    "test_certified_smoothing.py": _PACKAGE,
    "test_certified_swaps.py": _PACKAGE,
    "test_clipping_benchmarks.py": "runs benchmarks, which choose their device",
    "test_clipping_ddp.py": _RANKS,
    "test_columns.py": _PACKAGE,
    "test_cpu_features.py": "runs a compiler",
    "test_cuda_build.py": "runs cmake",
    "test_cuda_check.py": "reads reports of compilers",
    "test_cuda_device.py": "takes its tensors to the GPU itself, and runs without --device",
    "test_cuda_group.py": _EMULATOR,
    "test_cuda_fuzz.py": _EMULATOR,
    "test_cuda_kernels.py": _EMULATOR,
    "test_cuda_launch.py": _EMULATOR,
    "test_cuda_sample.py": _EMULATOR,
    "test_data.py": "has no tensors",
    "test_doctor.py": "has no tensors",
    "test_emulator.py": _EMULATOR,
    "test_examples.py": "runs examples, which choose the CPU",
    "test_files.py": "has no tensors",
    "test_export.py": "compares files on the CPU",
    "test_explain.py::test_swaps_are_whole_words_and_judged_as_printed": _PACKAGE,
    "test_explain_tasks.py": _PACKAGE,
    "test_fake_reviews.py": _PACKAGE,
    "test_fakes.py": _PACKAGE,
    "test_floors.py": "has no tensors",
    "test_form_ranks.py": _RANKS,
    "test_gpu_check.py": "runs what the tools do without a GPU",
    "test_honesty.py": _PACKAGE,
    "test_hybrid.py": _PACKAGE,
    "test_init.py": _PACKAGE,
    "test_llm.py": _PACKAGE,
    "test_models.py::test_a_value_that_its_field_does_not_have_is_not_read_in_another": (
        "a GPU's own assertion, after which it is of no use to the process"
    ),
    "test_news.py": _PACKAGE,
    "test_posts.py": _PACKAGE,
    "test_guard.py::test_averages_that_numpy_writes": "numpy writes memory of the CPU",
    "test_libraries.py::test_two_processes_give_what_one_does": _RANKS,
    "test_ops_fuzz.py": "test_cuda_device.py draws hostile calls for a GPU",
    "test_ops_grad_rows.py": "the rows that occur are found on the CPU alone",
    "test_ops_numerics.py::"
    "test_op_is_what_the_reference_says": "test_cuda_device.py has all its samples",
    "test_own_audit.py": _PACKAGE,
    "test_optimised_fakes.py": _PACKAGE,
    "test_pretrained.py": _PACKAGE,
    "test_predict.py": "the job chooses its device",
    "test_pretend.py": "makes the pretend device in a process of its own",
    "test_rating_tasks.py": _PACKAGE,
    "test_recipe.py": "has no tensors",
    "test_recipes.py": _PACKAGE,
    "test_rewriting.py": _PACKAGE,
    "test_rows.py": "has no tensors",
    "test_report.py": "has no tensors",
    "test_report_browser.py": "has no tensors",
    "test_replay.py::test_masks_are_drawn_once_and_freed": "masks are kept on a CPU alone",
    "test_simd_levels.py": "SIMD levels are the CPU's",
    "test_tasks.py::test_a_ranking_task_goes_through_the_jobs": "its task draws on the CPU",
    "test_statistics.py": _PACKAGE,
    "test_tune.py": _PACKAGE,
    "test_user_tables.py": _PACKAGE,
    "test_variants.py": _PACKAGE,
    "test_worst_case.py": _PACKAGE,
}

# What the pretend device cannot do beside that; on CUDA these run.
_AUTOCAST = "autocast does not know it"
_CAPTUM = "Captum was not tried on it"
_COMPILE = "torch.compile does not trace the pretend device"
_KERNELS = "the kernels and checks behind the pretend device are the CPU's"
_NO_STORAGE = "it has no storage"
_PLACING = "the library puts models on devices that it knows"
_SLOW = "thousands of small calls, each of which costs it milliseconds"
_SUBCLASS = "its tensors are a subclass, whose look-ups are never taken to be repeats"
NOT_ON_PRETEND = {
    "test_attack_properties.py": _SLOW,
    "test_autoattack.py": _SLOW,
    "test_certified_ranks.py": _SLOW,
    "test_minimum_norm.py": _SLOW,
    "test_ops_torch.py::test_tangents_are_refused_and_not_lost": "its tensors have no tangents",
    "test_options.py::test_attacks_run_where_gradients_are_off": "it has no inference tensors",
    "test_results.py::test_results_are_pickled_and_copied_without_model_and_graph": _NO_STORAGE,
    "test_results.py::test_what_numpy_and_python_draw_is_never_success": "it takes no numpy arrays",
    "test_sites.py::test_a_copy_of_the_model_stays_unperturbed": _NO_STORAGE,
    "test_torchrec.py::test_one_feature_alone": "its tensors are of a class with another name",
    "test_autocast.py": _AUTOCAST,
    "test_clipping.py::test_compiled": _COMPILE,
    "test_clipping.py::test_float32": "test_equals_loop_over_samples takes the same way",
    "test_clipping_defects.py::test_autocast": _AUTOCAST,
    "test_clipping_defects.py::test_compiled_model": _COMPILE,
    "test_clipping_calls.py::test_a_frozen_part_that_is_scripted": "scripts do not know the device",
    "test_clipping_calls.py::test_a_part_of_the_model_is_compiled": _COMPILE,
    "test_clipping_calls.py::test_compiled_code_that_draws_its_own_numbers": _COMPILE,
    "test_clipping_calls.py::test_outputs_that_are_not_dense": "it nests no tensors",
    "test_clipping_plain.py::test_weights_that_follow_others_move_once": _NO_STORAGE,
    "test_clipping_properties.py": _SLOW,
    "test_clipping_rules.py::test_inputs_are_kept_as_autocast_has_them": _AUTOCAST,
    "test_clipping_verify.py": "default dtypes and generators of the CPU",
    "test_clipping_libraries.py::test_automatic_mixed_precision_with_loss_scaling": _AUTOCAST,
    "test_compile.py": _COMPILE,
    "test_criteria.py::test_nothing_waits_for_a_gpu": "its fake tensors are said to be on CUDA",
    "test_criteria.py::test_pickles_and_copies": _NO_STORAGE,
    "test_gpu_model.py": _EMULATOR,
    "test_guard.py": "its tensors have no memory and versions of their own",
    "test_faults.py": _PLACING,
    "test_integrations.py::test_accelerate": _PLACING,
    "test_integrations.py::test_compiled_models": _COMPILE,
    "test_integrations.py::test_attacks_run_in_lightnings_evaluation": _PLACING,
    "test_integrations.py::test_lightning": _PLACING,
    "test_integrations.py::test_lightning_resumes_forms_in_the_middle_of_an_epoch": _PLACING,
    "test_libraries.py::test_virtual_tokens_before_the_text_have_no_labels": _PLACING,
    "test_integrations.py::test_peft_and_autocast": _AUTOCAST,
    "test_integrations.py::test_scaled_losses_are_not_differentiated_early": _PLACING,
    "test_explain.py::test_captum_gives_the_same": _CAPTUM,
    "test_explain.py::test_captums_methods_agree_where_parts_do_not_interact": _CAPTUM,
    "test_job.py": _PLACING,
    "test_objective.py::"
    "test_mixed_looks_up_once_and_makes_no_extra_pass_from_a_random_start": _SUBCLASS,
    "test_corners.py::test_modules_of_other_threads_are_left_alone": "other threads do not know it",
    "test_corners.py::test_ops_refuse_tensors_without_numbers_beside_others": _KERNELS,
    "test_corners.py::test_what_is_written_does_not_share_a_part_of_its_memory": _KERNELS,
    "test_ops_big.py": _KERNELS,
    "test_ops_hostile.py": _KERNELS,
    "test_ops_errors.py": _KERNELS,
    "test_ops_numerics.py": _KERNELS,
    "test_ops_properties.py": _KERNELS,
    "test_ops_torch.py::test_autocast_changes_nothing": _AUTOCAST,
    "test_ops_torch.py::test_autocast_gives_halves_to_the_ops": _AUTOCAST,
    "test_ops_torch.py::test_compiled_training_step_differentiates_through_ops": _COMPILE,
    "test_ops_torch.py::test_compiles_whole_and_once": _COMPILE,
    "test_ops_torch.py::test_exports_with_a_dynamic_batch": _COMPILE,
    "test_ops_torch.py::test_gradcheck": _SLOW,
    "test_ops_torch.py::test_gradient_is_that_of_the_reference": _SLOW,
    "test_ops_torch.py::test_meta_tensors_have_the_shapes_of_results": _KERNELS,
    "test_ops_torch.py::"
    "test_nothing_outside_a_view_is_written_and_alignment_does_not_matter": _KERNELS,
    "test_ops_torch.py::test_opcheck": _COMPILE,
    "test_ops_torch.py::test_results_share_no_memory_with_arguments": _NO_STORAGE,
    "test_perturb.py::test_embeddings_are_looked_up_once_per_batch": _SUBCLASS,
    "test_perturb.py::test_jagged_batches_have_a_ball_per_sample": "it has no nested tensors",
    "test_perturb.py::test_nothing_waits_for_the_device_until_it_is_read": _SUBCLASS,
    "test_perturb.py::test_weights_are_frozen_in_passes_for_the_delta_only": _SUBCLASS,
    "test_reference.py::test_ball_and_box": _SLOW,
    "test_reference.py::test_project_gradient": _SLOW,
    "test_reference.py::test_projection_is_the_nearest_point": _SLOW,
    "test_reference.py::test_steepest_ascent": _SLOW,
    "test_small_print.py": _SLOW,
    "test_staggered.py::test_a_resumed_run_gives_the_same_bits": _NO_STORAGE,
    "test_tasks.py::test_texts_of_a_file_are_encoded_like_those_of_a_part": _NO_STORAGE,
    "test_tasks.py::test_the_fingerprint_is_of_the_data": _NO_STORAGE,
    "test_tasks.py::test_what_is_saved_is_read_back": _NO_STORAGE,
    "test_trainer.py": _PLACING,
}

_ends_at: float | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="where the tests' tensors live: cpu, cuda, or pretend (see tests/devices.py)",
    )
    parser.addoption(
        "--seconds", type=float, help="tests that would begin after so many seconds are skipped"
    )


def excluded(device: str) -> dict[str, str]:
    """Files and tests that do not run on a device, with the reasons."""
    if device == "cpu":
        return {}
    return ON_THE_CPU_ALONE | (NOT_ON_PRETEND if device == "pretend" else {})


def pytest_configure(config: pytest.Config) -> None:
    global _ends_at
    seconds, device = config.getoption("--seconds"), config.getoption("--device")
    _ends_at = None if seconds is None else time.monotonic() + seconds
    if device == "cpu":
        return
    # From now on, so that what modules and fixtures make is on the device as well.
    import devices

    mode = devices.use(device)
    config.add_cleanup(lambda: mode.__exit__(None, None, None))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if collection_path.name in excluded(config.getoption("--device")) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = excluded(config.getoption("--device"))
    for item in items:
        reason = reasons.get(f"{item.path.name}::{item.name.split('[')[0]}")
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_runtest_setup() -> None:
    if _ends_at is not None and time.monotonic() > _ends_at:
        pytest.skip("the time was up")


@pytest.fixture
def small_disk() -> Iterator[Callable[[int], None]]:
    """No file may grow beyond a size, as on a full disk; the system says it with another number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def emulator_reset() -> Iterator[None]:
    """Gives the emulated device its own size and order back after the test."""
    yield
    from emulated_case import emulated

    emulated.kernels().set_device()
    emulated.kernels().set_order("forward")
