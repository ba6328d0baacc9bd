//! Texts of table cells.

use jiff::Timestamp;
use serde_json::{Value, json};

/// Time since a timestamp as kubectl writes it (apimachinery `duration.HumanDuration`).
#[must_use]
pub fn age(timestamp: &Value) -> Value {
    let Some(then) = timestamp.as_str().and_then(|text| text.parse::<Timestamp>().ok()) else {
        return json!("<unknown>");
    };
    json!(human_duration(Timestamp::now().as_second() - then.as_second()))
}

/// `5s`, `3m20s`, `2h5m`, `3d4h`, `12d`, `2y30d`.
#[must_use]
pub fn human_duration(seconds: i64) -> String {
    let pair = |big: i64, big_unit: &str, small: i64, small_unit: &str| {
        if small == 0 {
            format!("{big}{big_unit}")
        } else {
            format!("{big}{big_unit}{small}{small_unit}")
        }
    };
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        i64::MIN..-1 => "<invalid>".into(),
        -1..=0 => "0s".into(),
        1..120 => format!("{seconds}s"),
        120..600 => pair(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => pair(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => pair(days, "d", hours % 24, "h"),
        691_200..63_072_000 => format!("{days}d"),
        63_072_000..252_288_000 => pair(days / 365, "y", days % 365, "d"),
        _ => format!("{}y", days / 365),
    }
}

/// A string, or what stands for its absence.
#[must_use]
pub fn text(value: &Value, otherwise: &str) -> Value {
    match value.as_str().filter(|text| !text.is_empty()) {
        Some(text) => json!(text),
        None => json!(otherwise),
    }
}

/// `metadata.name`.
#[must_use]
pub fn name(object: &Value) -> Value {
    text(&object["metadata"]["name"], "")
}

/// Age of the object.
#[must_use]
pub fn object_age(object: &Value) -> Value {
    age(&object["metadata"]["creationTimestamp"])
}

/// Number of entries of an array or object.
#[must_use]
pub fn count(value: &Value) -> usize {
    value
        .as_array()
        .map(Vec::len)
        .or_else(|| value.as_object().map(serde_json::Map::len))
        .unwrap_or(0)
}

/// Strings joined by commas.
#[must_use]
pub fn joined<'a>(values: impl Iterator<Item = &'a str>, otherwise: &str) -> Value {
    let text = values.collect::<Vec<_>>().join(",");
    json!(if text.is_empty() { otherwise } else { &text })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_kubectl_writes_them() {
        for (seconds, text) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (700, "11m"),
            (3 * 3600 + 300, "3h5m"),
            (9 * 3600, "9h"),
            (2 * 86_400 + 3600, "2d1h"),
            (30 * 86_400, "30d"),
            (3 * 365 * 86_400, "3y"),
        ] {
            assert_eq!(human_duration(seconds), text);
        }
    }
}
