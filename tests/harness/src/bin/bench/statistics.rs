//! Medians and percentiles.

use serde::Serialize;

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

/// The middle of some figures, and how far most of them are from it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) p10: f64,
    pub(crate) median: f64,
    pub(crate) p90: f64,
}

impl Spread {
    /// Of these; all 0 without any.
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let last = values.len().saturating_sub(1);
        let at = |fraction: f64| {
            values.get((last as f64 * fraction).round() as usize).copied().unwrap_or_default()
        };
        Self { p10: at(0.1), median: at(0.5), p90: at(0.9) }
    }
}

/// How many times longer, in each round, what took `long` nanoseconds was than what took `short`.
pub(crate) fn ratios(long: &[u64], short: &[u64]) -> Spread {
    Spread::of(long.iter().zip(short).map(|(&long, &short)| long as f64 / short.max(1) as f64).collect())
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.1} ({:.1} to {:.1})", self.median, self.p10, self.p90)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_holds_signs() {
        let spread = Spread::of((-10..=10).rev().map(f64::from).collect());
        assert_eq!(spread, Spread { p10: -8.0, median: 0.0, p90: 8.0 });
        assert_eq!(spread.to_string(), "0.0 (-8.0 to 8.0)");
        assert_eq!(Spread::of(vec![]).median, 0.0);
    }

    #[test]
    fn what_is_of_one_round_is_compared() {
        // The machine was slow in the second round, for both.
        let spread = ratios(&[20, 60, 22], &[10, 30, 11]);
        assert_eq!(spread, Spread { p10: 2.0, median: 2.0, p90: 2.0 });
        assert_eq!(ratios(&[], &[1]).median, 0.0);
        assert_eq!(ratios(&[7], &[0]).median, 7.0);
    }

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
