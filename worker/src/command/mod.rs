//! Commands for people, on one model directory and without a server.
//!
//! | file | what |
//! |---|---|
//! | [`arguments`] | what the commands have in common: model, adapter, precision |
//! | [`messages`] | a file of messages, with its pictures and videos |
//! | [`inspect`] | what a checkpoint is, and whether its tensors fit |
//! | [`plan`] | what a request will cost, before anything is computed |
//! | [`generate`] | answers to a conversation |
//! | [`logits`] | everything that the model computes for a conversation, as a file |
//! | [`doctor`] | what this machine has for models, measured and checked |
//! | [`bench`] | how fast a model runs here, beside what the machine could do at most |
//! | [`throughput`] | how much faster the engine is on many requests than on one after the other |
//! | [`best_of_n`] | what sharing saves in best of n |
//! | [`convert`] | a checkpoint in another precision, with an adapter merged, in the hub's layout |

pub mod arguments;
pub mod bench;
pub mod best_of_n;
pub mod convert;
pub mod doctor;
pub mod generate;
pub mod inspect;
pub mod logits;
pub mod messages;
pub mod plan;
pub mod throughput;

/// A number of bytes as people read it.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{count} B")
    } else {
        format!("{value:.2} {}", UNITS[unit])
    }
}

/// A number with its thousands apart.
fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_for_people() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(57_344), "56.00 KiB");
        assert_eq!(bytes(141 << 30), "141.00 GiB");
        assert_eq!(grouped(7), "7");
        assert_eq!(grouped(8_292_166_656), "8,292,166,656");
    }
}
