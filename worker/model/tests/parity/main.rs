//! The models against transformers: `tests/parity/fixtures` of the repository holds what the scripts there computed.
//!
//! | file | what it is |
//! |---|---|
//! | `fixture.rs` | checkpoints and cases |
//! | `stored.rs` | where they lie, and how a tensor is held against what is stored of it |
//! | `facts.rs` | what holds for every family |
//! | `qwen2_5_vl.rs` | windows, angles and times of the one; adapters |
//! | `variants.rs` | a checkpoint in every layout that loads, and what is written again |

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail as tests do")]

mod facts;
mod fixture;
mod qwen2_5_vl;
mod stored;
mod variants;

/// Asserts each fact of each family in a test of its own.
macro_rules! families {
    ($($module:ident = $family:expr),+) => {
        $(mod $module {
            crate::test_each!(
                $family,
                parameters_are_exactly_those_of_the_reference,
                messages_become_the_token_ids_of_the_reference,
                messages_become_the_pixels_of_the_reference,
                positions_are_exactly_those_of_the_reference,
                rotary_tables_are_those_of_the_reference,
                the_stream_after_every_block_is_that_of_the_reference,
                logits_of_all_cases_in_one_ragged_batch_are_those_of_the_reference,
                a_row_alone_has_the_logits_that_it_has_in_a_batch,
                greedy_continuations_over_a_cache_repeat_the_reference,
                greedy_continuations_by_whole_rows_repeat_the_reference,
                repeated_rows_of_a_prefill_continue_alike,
                half_precision_is_as_close_as_that_of_the_reference,
                the_gradient_of_every_parameter_is_that_of_the_reference,
            );
        })+
    };
}

macro_rules! test_each {
    ($family:expr, $($fact:ident),+ $(,)?) => {
        $(#[test] fn $fact() { crate::facts::$fact(&crate::fixture::Suite::of($family)); })+
    };
}
use test_each;

families!(
    every_qwen2_5_vl = crate::fixture::Family::Qwen25Vl,
    every_llava_onevision = crate::fixture::Family::LlavaOneVision
);
