// SPDX-License-Identifier: GPL-2.0-or-later
//! Medians and percentiles.

#![forbid(unsafe_code)]

/// The distribution of times, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) p99: f64,
    pub(crate) p999: f64,
}

impl Spread {
    pub(crate) fn of(mut values: Vec<f64>) -> Self {
        values.sort_unstable_by(f64::total_cmp);
        let at = |part: f64| {
            let index = (values.len() as f64 * part) as usize;
            values.get(index.min(values.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
        };
        Self { median: at(0.5), p99: at(0.99), p999: at(0.999) }
    }
}

pub(crate) fn median(values: &[f64]) -> f64 {
    Spread::of(values.to_vec()).median
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tails_are_where_they_belong_in_any_order() {
        let values = (0..1000).rev().map(f64::from).collect();
        assert_eq!(Spread::of(values), Spread { median: 500.0, p99: 990.0, p999: 999.0 });
        assert_eq!(Spread::of(vec![7.0]), Spread { median: 7.0, p99: 7.0, p999: 7.0 });
        assert!(Spread::of(Vec::new()).median.is_nan());
    }
}
