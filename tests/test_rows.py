"""Each kind of wrong number that was once called reliable has tests: its first program, and at least two more of its kind."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
# The kinds, each with the files (test_*.py) and tests that hold its right values, refusals or flags.
KINDS_AND_TESTS = """
large common offset
    marginal a_large_common_term_hides_no_spread_and_is_not_called_exact
    marginal in_float64_a_large_common_term_changes_nothing
    marginal a_spread_that_float32_loses_altogether_is_not_called_exact
    marginal a_term_that_rounds_well_by_chance_is_seen_at_its_neighbours
    marginal terms_that_cancel_within_a_density_are_seen_in_float32
    evidence a_common_offset_changes_neither_k_nor_what_is_constant
constant tail
    marginal discrete_latents_are_not_stopped_at_zero_spread
    marginal constant_weights_of_the_prior_are_no_proof
    marginal constant_weights_of_draws_that_all_fell_on_one_value_are_not_called_exact
    marginal what_the_guide_never_draws_is_found_by_the_prior
coverage
    probes a_guide_that_misses_what_the_prior_allows_is_flagged
    probes the_cures_of_a_guide_that_misses_are_right
    probes only_the_data_whose_discrete_values_are_ruled_out_are_flagged
    probes a_value_of_probability_zero_is_flagged
no density
    checks a_guide_without_a_density_does_not_weigh
    checks one_delta_beside_a_normal_does_not_weigh
    checks an_auto_delta_trains_to_a_point_and_does_not_weigh
    checks a_delta_that_an_auxiliary_site_feeds_is_a_guide
    checks an_improper_prior_trains_and_is_not_scored
not a latent
    checks what_the_guide_observes_is_no_part_of_q
    checks a_causal_guide_that_observes_the_treatment_is_right
    checks a_factor_of_the_guide_is_a_term_of_the_loss_as_in_pyro
    checks a_labelled_single_cell_model_as_published
mass and density
    checks a_density_never_divides_a_mass
    checks measures_of_one_kind_are_fine
    checks draws_that_are_no_one_hot_vectors_weigh_nothing
particles mixed with data
    probes a_layer_that_counts_from_the_left_is_refused_and_right_one_by_one
    probes a_layer_that_mixes_data_is_refused
    probes a_guide_that_mixes_data_is_refused
    probes a_term_that_depends_on_the_size_of_the_batch_is_refused
masked array
    door a_masked_array_is_its_values_and_what_it_shows
    door a_list_of_masked_rows_keeps_what_it_hides
    door a_masked_array_beside_labels_and_of_counts_and_missing_values
    door a_vae_takes_masked_arrays_everywhere
surplus arrays
    door an_array_does_not_replace_a_setting
    door a_vae_takes_the_mask_beside_labels
    door arrays_that_nothing_takes
order
    door scores_are_in_the_order_of_the_data
    door loaders_that_shuffle_or_drop_are_read_in_order
    door a_random_part_of_the_data_is_refused
    door a_collate_fn_that_changes_the_order_is_refused
    evidence a_comparison_knows_the_data
one-pass streams
    door a_stream_is_scored_whole
    door a_second_epoch_of_a_stream_is_refused_before_the_first
    door validation_streams_too
tied to one set of data
    probes a_guide_with_a_parameter_for_each_datum_is_scored_whole
    probes a_plate_of_constant_size_and_parameters_by_place_are_scored_whole
    preflight pairs_tied_to_one_set_of_data_are_refused_other_batches
    preflight an_autoguide_in_one_batch_reaches_the_evidence
capture
    staging python_state_is_as_in_eager_mode
    staging scoring_reads_each_chunk_anew
    staging values_read_into_python_are_never_frozen
    staging scoring_is_compared_again_on_later_data
    staging other_rows_show_what_the_captured_ones_hide
probing
    probes scoring_a_pair_before_it_is_trained_changes_nothing
    probes an_autoguide_is_set_up_by_training_alone
    probes what_depends_on_the_data_first_sees_a_whole_batch
resume
    marginal a_file_is_refused_where_anything_has_changed
    marginal a_file_of_a_vae_is_refused_after_training_or_with_another_likelihood
    marginal a_file_is_refused_where_a_frozen_part_that_the_first_datum_never_meets_has_changed
exact, float32
    integration float32_linear_gaussian_pairs_are_right_within_what_rounding_may_cost
    integration residuals_are_taken_where_they_are_small
    integration float32_chains_with_full_covariances_and_masks_are_right_too
    integration sums_over_few_values_state_their_rounding
exact, modes
    integration quadrature_finds_modes_that_the_guide_does_not
    integration all_modes_of_one_latent_are_summed
    integration a_ring_of_two_latents_is_summed_and_a_thin_curve_is_flagged
    integration a_spike_between_all_points_is_flagged_where_a_draw_shows_it
periodic latents
    integration angles_are_integrated_over_one_turn
    integration two_angles_and_a_stretched_one_have_one_turn_each
    integration a_direction_on_a_sphere_is_refused_by_its_name
masks
    checks masks_of_a_latent_agree_in_both_programs
    checks masked_latents_that_the_model_uses_have_no_evidence
    checks masked_steps_of_a_sequence_are_left_out_wherever_the_mask_stands
    checks attend_infer_repeat_masks_by_a_latent
    integration latents_masked_inside_their_distribution_are_refused
later batches
    preflight a_bad_batch_of_a_loader_is_refused_when_it_comes
    preflight a_label_that_no_class_has_is_refused_with_its_row
    preflight a_loader_whose_data_change_is_checked_in_each_epoch
    preflight what_a_transform_makes_is_checked
early stopping
    preflight early_stopping_restores_parameters_and_buffers
    training patience_stops_and_restores_the_best
different measures
    evidence numbers_by_different_measures_are_not_ranked
    evidence our_likelihoods_say_what_they_condition_on
    evidence a_density_of_other_values_is_not_ranked
    evidence a_probability_of_coarser_values_is_not_ranked_and_of_renamed_ones_is
    evidence bits_per_dimension_count_what_was_observed_whatever_the_method
    checks a_value_that_a_latent_stretches_lacks_its_jacobian
networks that do not train
    preflight networks_that_will_not_train_are_named
    preflight a_bare_tensor_that_will_not_train_is_named_too
two models, one process
    probes the_same_text_twice_trains_and_scores_as_if_alone
    probes our_models_and_autoguides_of_one_name_do_not_meet
    probes parameters_of_both_programs_under_one_name_are_found
types
    door float64_data_of_a_pair_without_parameters_stay
    door integer_images_are_cast_for_a_network_with_a_word
    door simulated_counts_pass_255
    door data_take_the_type_of_a_network_in_float64
an integer array by name
    data the_likelihood_of_a_file_is_chosen_by_support
    config the_likelihood_that_was_chosen_is_written_down
    cli the_likelihood_of_a_file_is_said_and_written_down
also found: events broadcast
    checks an_observed_value_is_not_broadcast
    checks a_constant_that_every_datum_observes_is_fine
also found: zeros under Beta and Gamma
    preflight values_at_the_edge_of_a_density_are_named
    preflight a_zero_in_a_later_batch_is_named_when_it_comes
also found: supports of mixtures
    integration mixtures_live_where_any_component_does
    integration our_own_mixture_priors_have_exact_answers
also found: bounds of a Uniform
    integration uniforms_take_bounds_of_any_shape_and_from_earlier_latents
    checks values_outside_a_support_that_a_latent_moves_weigh_nothing
also found: draws outside the support
    checks a_draw_outside_the_prior_weighs_nothing
    checks more_values_than_the_prior_has_weigh_nothing
    checks a_draw_outside_the_prior_leaves_the_gradients_finite
also found: dropout through a partial
    probes dropout_is_off_in_scoring_wherever_the_network_is_held
also found: a last batch of one
    preflight a_last_batch_of_one_under_batch_norm_is_refused_before_the_first_step
    preflight several_particles_of_a_last_datum_are_enough_and_leave_no_trace
    probes a_last_batch_that_cannot_run_is_refused_before_training
also found: reshaping by the batch
    checks a_decoder_that_reshapes_by_the_batch_is_told_of_particles
    checks causes_are_named_by_what_the_user_wrote
also found: four million dimensions
    integration four_million_terms_are_summed_without_float32s_steps
Pyro's: shapes of a latent
    checks shapes_of_a_latent_agree_in_both_programs
Pyro's: effect autoguides
    checks effect_guides_are_guides
Pyro's: rejection samplers
    checks a_rejection_sampler_is_not_a_path
refused wrongly: plates without a size
    checks a_plate_without_a_size_takes_it_from_batched_sites
    checks a_conditional_vae_as_published_trains_and_is_exact
    checks a_plate_without_a_size_does_not_share_a_draw
refused wrongly: one common scale
    checks one_scale_around_everything_scales_the_objective_only
    checks a_scale_that_depends_on_the_batch_is_steady_or_refused
refused wrongly: autoguides
    checks an_autoguide_of_one_vector_for_all_data_is_refused
    checks auto_normal_has_a_factor_for_each_datum
wrong words: raw errors
    checks a_dimension_that_is_not_there_is_said_in_a_sentence
    checks programs_of_different_arguments_are_said_to_be
    preflight lazy_modules_are_run_first
wrong words: the plate
    checks the_plate_that_most_sites_share_is_named
    checks a_factor_of_no_datum_is_refused
wrong words: the scale of data
    preflight pixels_under_a_normal_are_told_their_scale
    preflight a_cure_is_not_what_was_done_already
    preflight infinite_values_made_by_a_program_are_named
"""


def _kinds() -> dict[str, list[tuple[str, str]]]:
    kinds: dict[str, list[tuple[str, str]]] = {}
    for line in KINDS_AND_TESTS.strip().splitlines():
        if line.startswith(" "):
            file, name = line.split()
            kinds[list(kinds)[-1]].append((file, name))
        else:
            kinds[line] = []
    return kinds


KINDS = _kinds()
# Kinds that are one program by nature, or of which Pyro has no more.
FEW = {
    "also found: four million dimensions", "early stopping", "Pyro's: effect autoguides", "Pyro's: rejection samplers",
    "wrong words: the plate",
}  # fmt: skip


@cache
def _cases(file: str) -> dict[str, int]:
    """The tests of a file, each with the number of cases that its parameters give it, as far as the source shows."""
    tree = ast.parse((FOLDER / f"test_{file}.py").read_text(encoding="utf-8"))
    sizes = {
        target.id: len(node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts)
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict | ast.List | ast.Tuple)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            number = 1
            for mark in node.decorator_list:
                values = mark.args[1] if isinstance(mark, ast.Call) and len(mark.args) > 1 else None
                number *= len(values.elts) if isinstance(values, ast.List | ast.Tuple) else 1
                number *= sizes.get(values.id, 1) if isinstance(values, ast.Name) else 1
            found[node.name] = number
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_has_its_tests(kind: str) -> None:
    number = 0
    for file, name in KINDS[kind]:
        assert f"test_{name}" in _cases(file), f"tests/test_{file}.py has no test_{name}: name the one that holds {kind!r}"
        number += _cases(file)[f"test_{name}"]
    assert number >= (1 if kind in FEW else 3), f"{kind!r} has {number} programs: write two more of its kind, in other words"
