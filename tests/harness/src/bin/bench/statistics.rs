//! Medians and percentiles.

/// The value below which this fraction of the values is; 0 without any.
pub(crate) fn quantile(values: &mut [u64], fraction: f64) -> u64 {
    values.sort_unstable();
    let last = values.len().saturating_sub(1);
    values.get((last as f64 * fraction).round() as usize).copied().unwrap_or_default()
}

/// The value in the middle; 0 without any.
pub(crate) fn median(mut values: Vec<u64>) -> u64 {
    quantile(&mut values, 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_few_and_many() {
        assert_eq!(median(vec![]), 0);
        assert_eq!(median(vec![7]), 7);
        assert_eq!(median(vec![9, 1, 5]), 5);
        let mut values: Vec<u64> = (0..=1000).rev().collect();
        assert_eq!(quantile(&mut values, 0.99), 990);
        assert_eq!(quantile(&mut values, 1.0), 1000);
    }
}
