//! Numbers as `kubectl get` shows them.

/// `93.1%` of a share from 0 to 1.
pub fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

/// `45s`, `2m10s`, `3h05m`, `2d04h`.
pub fn duration(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{:02}s", seconds % 60),
        (0, _, _) => format!("{hours}h{:02}m", minutes % 60),
        _ => format!("{days}d{:02}h", hours % 24),
    }
}

/// `812 B`, `3.4 MB`, `15.2 GB` (powers of ten).
pub fn bytes(count: u64) -> String {
    if count < 1000 {
        return format!("{count} B");
    }
    let (mut tenths, mut units) = (count / 100, ["kB", "MB", "GB", "TB"].into_iter().peekable());
    let mut unit = "kB";
    while let Some(next) = units.next() {
        unit = next;
        if tenths < 10_000 || units.peek().is_none() {
            break;
        }
        tenths /= 1000;
    }
    format!("{}.{} {unit}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_shown_as_a_percentage() {
        assert_eq!(percent(0.931), "93.1%");
        assert_eq!(percent(1.0), "100.0%");
    }

    #[test]
    fn a_duration_has_two_units_at_most() {
        assert_eq!(duration(45), "45s");
        assert_eq!(duration(130), "2m10s");
        assert_eq!(duration(3 * 3600 + 305), "3h05m");
        assert_eq!(duration(2 * 86_400 + 4 * 3600), "2d04h");
    }

    #[test]
    fn bytes_are_shown_in_powers_of_ten() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(999), "999 B");
        assert_eq!(bytes(3_449_000), "3.4 MB");
        assert_eq!(bytes(15_200_000_000), "15.2 GB");
        assert_eq!(bytes(7_000_000_000_000_000), "7000.0 TB");
    }
}
