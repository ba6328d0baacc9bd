use proptest::prelude::*;
use rand::{Rng, SeedableRng, rngs::StdRng};

use super::*;
use crate::shape::NAMES;

fn shape(group: usize, kv_heads: usize, head_dim: usize, inner: usize, rows: usize) -> TextShape {
    TextShape {
        hidden: 12,
        layers: 1,
        heads: group * kv_heads,
        kv_heads,
        head_dim,
        intermediate: inner,
        vocabulary: rows,
        eps: 1e-6,
        theta: 1e4,
        sections: [head_dim / 2, 0, 0],
        tied: false,
    }
}

/// Shapes that 4 ranks can share, with and without key heads that several of them hold.
fn shapes() -> impl Strategy<Value = TextShape> {
    let heads = prop_oneof![Just((3, 4)), Just((1, 8)), Just((2, 2)), Just((4, 1)), Just((8, 2))];
    (heads, 1..4usize, 1..5usize, 1..5usize)
        .prop_map(|((group, kv_heads), half, inner, rows)| shape(group, kv_heads, 2 * half, 4 * inner, 4 * rows))
}

fn shards(shape: &TextShape, size: usize) -> Vec<Shard> {
    (0..size).map(|rank| Shard::new(shape, rank, size).unwrap()).collect()
}

fn draw(seed: u64, length: usize) -> Vec<f32> {
    let mut random = StdRng::seed_from_u64(seed);
    (0..length).map(|_| random.random_range(-1.0..1.0)).collect()
}

/// `out[rows, outputs]` in f64.
fn linear(x: &[f32], weight: &[f32], inputs: usize) -> Vec<f64> {
    let outputs = x.chunks_exact(inputs).flat_map(|row| {
        weight.chunks_exact(inputs).map(move |outputs| {
            let products = row
                .iter()
                .zip(outputs)
                .map(|(x, weight)| f64::from(*x) * f64::from(*weight));
            products.sum::<f64>()
        })
    });
    outputs.collect()
}

/// Every index below `length` lies in exactly `times` of the ranges.
fn tiles(ranges: impl Iterator<Item = Range<usize>>, indices: Range<usize>, times: usize) -> bool {
    let mut seen = vec![0; indices.end];
    ranges.flatten().for_each(|index| seen[index] += 1);
    seen[indices].iter().all(|count| *count == times)
}

/// Columns of the input that a shard multiplies, and its part of the weight.
type Part<'a> = &'a dyn Fn(&Shard) -> (Range<usize>, Vec<f32>);

proptest! {
    #[test]
    fn shards_tile_the_whole(shape in shapes(), size in prop_oneof![Just(1usize), Just(2), Just(4)]) {
        let shards = shards(&shape, size);
        let (queries, packed) = (shape.query_width(), shape.packed_width());
        let all = |range: fn(&Shard) -> Vec<Range<usize>>| shards.iter().flat_map(range).collect::<Vec<_>>().into_iter();
        prop_assert!(tiles(all(|shard| vec![shard.heads()]), 0..shape.heads, 1));
        prop_assert!(tiles(all(|shard| shard.qkv_rows()[..1].to_vec()), 0..queries, 1));
        let copies = (size / shape.kv_heads).max(1);
        prop_assert!(tiles(all(|shard| shard.qkv_rows()[1..].to_vec()), queries..packed, copies));
        prop_assert!(tiles(all(|shard| vec![shard.output_columns()]), 0..queries, 1));
        prop_assert!(tiles(all(|shard| shard.gate_up_rows().to_vec()), 0..2 * shape.intermediate, 1));
        prop_assert!(tiles(all(|shard| vec![shard.down_columns()]), 0..shape.intermediate, 1));
        prop_assert!(tiles(all(|shard| vec![shard.tokens()]), 0..shape.vocabulary, 1));
    }

    /// A rank's query heads attend to the key heads that they attend to in the whole model.
    #[test]
    fn query_heads_stay_with_their_key_heads(shape in shapes(), size in prop_oneof![Just(1usize), Just(2), Just(4)]) {
        let group = shape.heads / shape.kv_heads;
        for shard in shards(&shape, size) {
            let local = shard.local();
            let local_group = local.heads / local.kv_heads;
            for (index, head) in shard.heads().enumerate() {
                prop_assert_eq!(shard.kv_heads().start + index / local_group, head / group);
            }
        }
    }

    /// Outputs of matrices cut by rows, side by side, and sums of those cut by columns are what the whole matrix gives.
    #[test]
    fn linear_layers_in_parts_are_the_whole(
        shape in shapes(), size in prop_oneof![Just(1usize), Just(2), Just(4)], seed: u64,
    ) {
        let (hidden, queries, inner) = (shape.hidden, shape.query_width(), shape.intermediate);
        let x = draw(seed, 3 * hidden);
        let shards = shards(&shape, size);

        let table = draw(seed ^ 1, shape.vocabulary * hidden);
        let logits = linear(&x, &table, hidden);
        for shard in &shards {
            let local = linear(&x, &shard.table(&table), hidden);
            for (row, part) in logits.chunks_exact(shape.vocabulary).zip(local.chunks_exact(shape.vocabulary / size)) {
                prop_assert_eq!(&row[shard.tokens()], part);
            }
        }

        let packed = draw(seed ^ 2, shape.packed_width() * hidden);
        let heads = linear(&x, &packed, hidden);
        for shard in &shards {
            let local = linear(&x, &shard.qkv(&packed), hidden);
            let rows = heads.chunks_exact(shape.packed_width());
            for (row, part) in rows.zip(local.chunks_exact(shard.local().packed_width())) {
                let ours = shard.qkv_rows().into_iter().flatten().map(|index| row[index]).collect::<Vec<_>>();
                prop_assert_eq!(ours.as_slice(), part);
            }
        }

        let sums = |width: usize, weight: &[f32], part: Part<'_>| {
            let x = draw(seed ^ 3, 3 * width);
            let whole = linear(&x, weight, width);
            let mut sum = vec![0f64; whole.len()];
            for shard in &shards {
                let (columns_here, weight) = part(shard);
                let x = columns(&x, width, &columns_here);
                let local = linear(&x, &weight, columns_here.len());
                sum.iter_mut().zip(local).for_each(|(sum, local)| *sum += local);
            }
            whole.iter().zip(&sum).all(|(whole, sum)| (whole - sum).abs() < 1e-9)
        };
        let output = draw(seed ^ 4, hidden * queries);
        prop_assert!(sums(queries, &output, &|shard| (shard.output_columns(), shard.output(&output))));
        let down = draw(seed ^ 5, hidden * inner);
        prop_assert!(sums(inner, &down, &|shard| (shard.down_columns(), shard.down(&down))));
    }
}

#[test]
fn a_local_shape_counts_what_the_rank_holds() {
    let shape = TextShape::named("qwen2.5-vl-72b").unwrap();
    for size in [1, 2, 4, 8] {
        let shards = shards(&shape, size);
        let local = shards[0].local();
        assert!(shards.iter().all(|shard| shard.local() == local));
        // Norms are everywhere, the rest once.
        let norms = (2 * shape.layers + 1) * shape.hidden;
        assert_eq!(
            size * (local.parameters() - norms) + norms,
            shape.parameters(),
            "{size}"
        );
        assert_eq!(size * local.kv_values(), shape.kv_values());
    }
}

#[test]
fn more_ranks_than_key_heads_hold_them_together() {
    let shape = TextShape::named("qwen2.5-vl-3b").unwrap();
    let shards = shards(&shape, 8);
    assert_eq!(shards[0].copies(), 4);
    assert_eq!(
        shards.iter().map(|shard| shard.kv_heads().start).collect::<Vec<_>>(),
        [0, 0, 0, 0, 1, 1, 1, 1]
    );
    assert_eq!(shards[5].heads(), 10..12);
    assert_eq!(4 * shards[0].local().kv_values(), 2 * shape.kv_values());
}

#[test]
fn what_cannot_be_shared_is_refused_with_the_reason() {
    let error = |name: &str, size: usize| {
        let shape = TextShape::named(name).unwrap();
        Shard::new(&shape, 0, size).map_err(|error| error.to_string())
    };
    let seven = error("qwen2.5-vl-7b", 8).unwrap_err();
    assert!(
        seven.contains("2 ranks hold each of the 4 key and value heads"),
        "{seven}"
    );
    assert!(seven.contains("cannot share its 7 query heads evenly"), "{seven}");
    let three = error("qwen2.5-vl-72b", 3).unwrap_err();
    assert!(three.contains("3 ranks cannot share 8 key and value heads"), "{three}");
    let small = error("llava-onevision-0.5b", 4).unwrap_err();
    assert!(small.contains("cannot share its 7 query heads"), "{small}");
    let odd = Shard::new(&shape(1, 2, 4, 6, 5), 0, 2).unwrap_err().to_string();
    assert_eq!(
        odd,
        "2 ranks cannot share 5 rows of the vocabulary: 2 does not divide 5"
    );
    let rank = Shard::new(&shape(1, 2, 4, 6, 4), 2, 2).unwrap_err().to_string();
    assert_eq!(rank, "rank 2 of 2 ranks");
}

#[test]
fn released_models_can_be_shared_by_as_many_as_their_heads_allow() {
    let most = NAMES.map(|name| {
        let shape = TextShape::named(name).unwrap();
        let sizes = [1, 2, 4, 8].into_iter();
        sizes.filter(|size| Shard::new(&shape, 0, *size).is_ok()).max().unwrap()
    });
    assert_eq!(most, [8, 4, 8, 2, 4, 8]);
}
