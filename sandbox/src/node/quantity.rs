//! Resource quantities (`500m`, `2Gi`, `1e3`) as whole thousandths.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Thousandths of the quantity's unit, rounded up as Kubernetes does; `None` when it is no quantity or too large.
pub fn milli(quantity: &Quantity) -> Option<i128> {
    let text = quantity.0.trim();
    let split = text
        .find(|c: char| !matches!(c, '0'..='9' | '.' | '+' | '-'))
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let (factor_numerator, factor_denominator) = factor(suffix)?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if fraction.len() > 18 || whole.len() > 18 || (whole.is_empty() && fraction.is_empty()) {
        return None;
    }
    let digits: i128 = format!("{whole}{fraction}").parse().ok()?;
    let denominator = 10_i128
        .checked_pow(u32::try_from(fraction.len()).ok()?)?
        .checked_mul(factor_denominator)?;
    let numerator = digits.checked_mul(factor_numerator)?.checked_mul(1000)?;
    let quotient = numerator.div_euclid(denominator);
    Some(if numerator.rem_euclid(denominator) == 0 {
        quotient
    } else {
        quotient + 1
    })
}

fn factor(suffix: &str) -> Option<(i128, i128)> {
    Some(match suffix {
        "" => (1, 1),
        "n" => (1, 1_000_000_000),
        "u" => (1, 1_000_000),
        "m" => (1, 1000),
        "k" => (1000, 1),
        "M" => (1_000_000, 1),
        "G" => (1_000_000_000, 1),
        "T" => (1_000_000_000_000, 1),
        "P" => (1_000_000_000_000_000, 1),
        "E" => (1_000_000_000_000_000_000, 1),
        "Ki" => (1 << 10, 1),
        "Mi" => (1 << 20, 1),
        "Gi" => (1 << 30, 1),
        "Ti" => (1 << 40, 1),
        "Pi" => (1 << 50, 1),
        "Ei" => (1 << 60, 1),
        _ => {
            let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
            let power = 10_i128
                .checked_pow(exponent.unsigned_abs())
                .filter(|_| exponent.abs() <= 18)?;
            if exponent >= 0 { (power, 1) } else { (1, power) }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> Option<i128> {
        milli(&Quantity(text.to_owned()))
    }

    #[test]
    fn decimal_binary_and_exponent_forms_are_read() {
        assert_eq!(of("2"), Some(2000));
        assert_eq!(of("500m"), Some(500));
        assert_eq!(of("1.5"), Some(1500));
        assert_eq!(of("1Ki"), Some(1_024_000));
        assert_eq!(of("1e3"), Some(1_000_000));
        assert_eq!(of("0.5Gi"), Some(536_870_912_000));
    }

    #[test]
    fn less_than_a_thousandth_is_rounded_up() {
        assert_eq!(of("1n"), Some(1));
    }

    #[test]
    fn what_is_no_quantity_is_refused() {
        for text in ["", "x", "1Q", "1e99", "--1"] {
            assert_eq!(of(text), None, "{text}");
        }
    }
}
