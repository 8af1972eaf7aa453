//! Rounds become tables, ratios, and the answer to whether the targets are met.
//!
//! A cell is the median over the rounds with the smallest and the largest in brackets. A ratio is
//! the median of the rounds' own ratios: two contenders are compared within a round, minutes
//! apart at most, so that a machine that slows down over the run does not tilt it.

use std::{collections::BTreeMap, fmt::Write};

use serde::Serialize;

use super::{
    contender::Contender,
    measure::{Metric, Round},
};

/// Several rounds' worth of one figure.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    pub(crate) rounds: usize,
}

impl Spread {
    fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = values.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median = if sorted.len() % 2 == 1 {
            sorted[middle]
        } else {
            f64::midpoint(sorted[middle - 1], sorted[middle])
        };
        Some(Self {
            median,
            min,
            max,
            rounds: sorted.len(),
        })
    }
}

/// What all the rounds say together.
pub(crate) struct Report<'a> {
    rounds: &'a [Round],
}

impl<'a> Report<'a> {
    pub(crate) fn of(rounds: &'a [Round]) -> Self {
        Self { rounds }
    }

    /// What a person reads, and what the README shows.
    pub(crate) fn tables(&self) -> String {
        let mut text = String::new();
        self.table(
            &mut text,
            "across two nodes",
            &[
                Contender::None,
                Contender::Picomesh,
                Contender::Haproxy,
                Contender::Nginx,
            ],
            &[
                (Contender::Picomesh, Contender::None),
                (Contender::Picomesh, Contender::Haproxy),
                (Contender::Picomesh, Contender::Nginx),
                (Contender::Haproxy, Contender::None),
                (Contender::Nginx, Contender::None),
            ],
        );
        self.table(
            &mut text,
            "on one node",
            &[Contender::NoneOneNode, Contender::PicomeshOneNode],
            &[(Contender::PicomeshOneNode, Contender::NoneOneNode)],
        );
        text
    }

    /// Met or missed, one line for each target of which both figures are there.
    pub(crate) fn targets(&self) -> Vec<Verdict> {
        TARGETS
            .iter()
            .filter_map(|target| {
                let value = match target.against {
                    Some(other) => self.ratio(target.metric, target.of, other)?,
                    None => self.spread(target.metric, target.of)?,
                };
                Some(target.judge(value.median))
            })
            .collect()
    }

    /// contender → metric → spread.
    pub(crate) fn summary(&self) -> BTreeMap<&'static str, BTreeMap<&'static str, Spread>> {
        Contender::ALL
            .into_iter()
            .map(|contender| {
                let spreads = Metric::ALL
                    .into_iter()
                    .filter_map(|m| Some((m.key(), self.spread(m, contender)?)))
                    .collect();
                (contender.name(), spreads)
            })
            .collect()
    }

    /// "contender / other" → metric → spread, against the control and against haproxy.
    pub(crate) fn ratios(&self) -> BTreeMap<String, BTreeMap<&'static str, Spread>> {
        let mut all = BTreeMap::new();
        for contender in Contender::ALL {
            let others = match contender {
                Contender::None | Contender::NoneOneNode => vec![],
                Contender::Picomesh => vec![Contender::None, Contender::Haproxy, Contender::Nginx],
                Contender::Haproxy => vec![Contender::None],
                Contender::Nginx => vec![Contender::None, Contender::Haproxy],
                Contender::PicomeshOneNode => vec![contender.control()],
            };
            for other in others {
                let spreads: BTreeMap<_, _> = Metric::ALL
                    .into_iter()
                    .filter_map(|m| Some((m.key(), self.ratio(m, contender, other)?)))
                    .collect();
                if !spreads.is_empty() {
                    all.insert(format!("{} / {}", contender.name(), other.name()), spreads);
                }
            }
        }
        all
    }

    fn spread(&self, metric: Metric, contender: Contender) -> Option<Spread> {
        Spread::of(
            self.rounds
                .iter()
                .filter(|r| r.contender == contender.name())
                .filter_map(|r| r.values.get(metric.key()).copied()),
        )
    }

    fn ratio(&self, metric: Metric, of: Contender, against: Contender) -> Option<Spread> {
        Spread::of(self.rounds.iter().filter_map(|round| {
            if round.contender != of.name() {
                return None;
            }
            let other = self
                .rounds
                .iter()
                .find(|r| r.round == round.round && r.contender == against.name())?;
            let value = *round.values.get(metric.key())?;
            let other = *other.values.get(metric.key())?;
            (other > 0.0).then(|| value / other)
        }))
    }

    fn table(
        &self,
        text: &mut String,
        where_: &str,
        columns: &[Contender],
        ratios: &[(Contender, Contender)],
    ) {
        let ran = |c: &Contender| self.rounds.iter().any(|r| r.contender == c.name());
        let columns: Vec<Contender> = columns.iter().copied().filter(ran).collect();
        let ratios: Vec<_> = ratios
            .iter()
            .copied()
            .filter(|(a, b)| ran(a) && ran(b))
            .collect();
        if columns.is_empty() {
            return;
        }
        let mut rows = vec![vec![format!("32 connections, {where_}")]];
        rows[0].extend(columns.iter().map(|c| c.title().to_owned()));
        rows[0].extend(ratios.iter().map(|(a, b)| {
            let word = |c: &Contender| c.title().split(" TCP").next().unwrap_or_default();
            format!("{} ÷ {}", word(a), word(b))
        }));
        for metric in Metric::ALL {
            let cells: Vec<Option<Spread>> =
                columns.iter().map(|c| self.spread(metric, *c)).collect();
            if cells.iter().all(Option::is_none) {
                continue;
            }
            let mut row = vec![metric.title().to_owned()];
            row.extend(cells.into_iter().map(|c| cell(c, metric.digits())));
            row.extend(ratios.iter().map(|(a, b)| {
                self.ratio(metric, *a, *b)
                    .map_or_else(|| "–".into(), |r| number(r.median, 2))
            }));
            rows.push(row);
        }
        markdown(text, &rows);
        text.push('\n');
    }
}

/// A figure that the project wants to reach.
struct Target {
    what: &'static str,
    metric: Metric,
    of: Contender,
    /// A ratio to this contender; an absolute figure without.
    against: Option<Contender>,
    more_is_better: bool,
    at_least: f64,
    goal: f64,
}

const TARGETS: [Target; 9] = [
    Target {
        what: "max req/s, against haproxy",
        metric: Metric::Requests,
        of: Contender::Picomesh,
        against: Some(Contender::Haproxy),
        more_is_better: true,
        at_least: 1.2,
        goal: 2.0,
    },
    Target {
        what: "CPU per request at max, against haproxy",
        metric: Metric::RequestCpu,
        of: Contender::Picomesh,
        against: Some(Contender::Haproxy),
        more_is_better: false,
        at_least: 0.7,
        goal: 0.4,
    },
    Target {
        what: "p50 at 1,000 req/s, against haproxy",
        metric: Metric::P50,
        of: Contender::Picomesh,
        against: Some(Contender::Haproxy),
        more_is_better: false,
        at_least: 1.0,
        goal: 0.7,
    },
    Target {
        what: "new connections/s, against haproxy",
        metric: Metric::Connections,
        of: Contender::Picomesh,
        against: Some(Contender::Haproxy),
        more_is_better: true,
        at_least: 5.0,
        goal: 12.0,
    },
    Target {
        what: "one stream of bulk, against nginx",
        metric: Metric::Bulk,
        of: Contender::Picomesh,
        against: Some(Contender::Nginx),
        more_is_better: true,
        at_least: 1.0,
        goal: 1.3,
    },
    Target {
        what: "one node, max req/s, against no mesh",
        metric: Metric::Requests,
        of: Contender::PicomeshOneNode,
        against: Some(Contender::NoneOneNode),
        more_is_better: true,
        at_least: 0.4,
        goal: 0.6,
    },
    Target {
        what: "resident idle, MB",
        metric: Metric::Idle,
        of: Contender::Picomesh,
        against: None,
        more_is_better: false,
        at_least: 16.0,
        goal: 10.0,
    },
    Target {
        what: "resident with 1,000 connections, MB",
        metric: Metric::Open,
        of: Contender::Picomesh,
        against: None,
        more_is_better: false,
        at_least: 24.0,
        goal: 14.0,
    },
    Target {
        what: "resident after a burst, MB",
        metric: Metric::After,
        of: Contender::Picomesh,
        against: None,
        more_is_better: false,
        at_least: 24.0,
        goal: 14.0,
    },
];

/// How a target was reached.
#[derive(Debug, Serialize)]
pub(crate) struct Verdict {
    pub(crate) what: &'static str,
    pub(crate) value: f64,
    pub(crate) at_least: f64,
    pub(crate) goal: f64,
    pub(crate) met: bool,
    /// By how much of `at_least` it falls short; 0 when it is met.
    pub(crate) missed_by_percent: f64,
    pub(crate) goal_met: bool,
}

impl Target {
    fn judge(&self, value: f64) -> Verdict {
        let reaches = |wanted: f64| {
            if self.more_is_better {
                value >= wanted
            } else {
                value <= wanted
            }
        };
        let short = if self.more_is_better {
            1.0 - value / self.at_least
        } else {
            value / self.at_least - 1.0
        };
        Verdict {
            what: self.what,
            value,
            at_least: self.at_least,
            goal: self.goal,
            met: reaches(self.at_least),
            missed_by_percent: (short * 100.0).max(0.0),
            goal_met: reaches(self.goal),
        }
    }
}

impl Verdict {
    pub(crate) fn line(&self) -> String {
        let verdict = if self.goal_met {
            "met, and the goal".to_owned()
        } else if self.met {
            "met".to_owned()
        } else {
            format!("missed by {:.1} %", self.missed_by_percent)
        };
        format!(
            "{:<40} {:>7}   wanted {:>5}, goal {:>5}   {verdict}",
            self.what,
            number(self.value, 2),
            self.at_least,
            self.goal
        )
    }
}

fn cell(spread: Option<Spread>, digits: usize) -> String {
    match spread {
        None => "–".into(),
        Some(s) if s.rounds == 1 => number(s.median, digits),
        Some(s) => format!(
            "{} ({}–{})",
            number(s.median, digits),
            number(s.min, digits),
            number(s.max, digits)
        ),
    }
}

/// With commas between thousands.
fn number(value: f64, digits: usize) -> String {
    let plain = format!("{value:.digits$}");
    let (whole, fraction) = plain.split_once('.').unwrap_or((&plain, ""));
    let mut text = String::new();
    for (i, digit) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if !fraction.is_empty() {
        text.push('.');
        text.push_str(fraction);
    }
    text
}

/// A table that reads the same in a terminal and rendered.
fn markdown(text: &mut String, rows: &[Vec<String>]) {
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..rows.first().map_or(0, Vec::len)).map(width).collect();
    for (i, row) in rows.iter().enumerate() {
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            // Figures stand to the right, what they are of to the left.
            let pad = " ".repeat(width - cell.chars().count());
            let _ = match column {
                0 => write!(text, "| {cell}{pad} |"),
                _ => write!(text, " {pad}{cell} |"),
            };
        }
        text.push('\n');
        if i == 0 {
            for (column, width) in widths.iter().enumerate() {
                let _ = match column {
                    0 => write!(text, "| {} |", "-".repeat(*width)),
                    _ => write!(text, " {}: |", "-".repeat(width - 1)),
                };
            }
            text.push('\n');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(round: u32, contender: Contender, metric: Metric, value: f64) -> Round {
        Round {
            round,
            contender: contender.name(),
            values: [(metric.key(), value)].into(),
            failed: BTreeMap::new(),
            more: BTreeMap::new(),
        }
    }

    #[test]
    fn a_spread_is_median_least_and_most() {
        let odd = Spread::of([3.0, 1.0, 2.0]).unwrap();
        assert_eq!(
            (odd.median, odd.min, odd.max, odd.rounds),
            (2.0, 1.0, 3.0, 3)
        );
        assert_eq!(Spread::of([1.0, 4.0]).unwrap().median, 2.5);
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn a_ratio_compares_within_rounds() {
        // The machine halves its speed after each round; the ratio does not move.
        let mut rounds = Vec::new();
        for (i, speed) in [(1, 4.0), (2, 2.0), (3, 1.0)] {
            rounds.push(round(i, Contender::Haproxy, Metric::Requests, speed));
            rounds.push(round(i, Contender::Picomesh, Metric::Requests, 1.5 * speed));
        }
        // Of a round that lacks one of the two there is no ratio.
        rounds.push(round(4, Contender::Picomesh, Metric::Requests, 100.0));
        let report = Report::of(&rounds);
        let ratio = report
            .ratio(Metric::Requests, Contender::Picomesh, Contender::Haproxy)
            .unwrap();
        assert_eq!((ratio.min, ratio.median, ratio.max), (1.5, 1.5, 1.5));
        assert_eq!(ratio.rounds, 3);
    }

    #[test]
    fn a_target_says_by_how_much_it_was_missed() {
        let judge = |requests: f64, cpu: f64| {
            let rounds = [
                round(1, Contender::Haproxy, Metric::Requests, 100.0),
                round(1, Contender::Picomesh, Metric::Requests, requests),
                round(2, Contender::Haproxy, Metric::RequestCpu, 10.0),
                round(2, Contender::Picomesh, Metric::RequestCpu, cpu),
            ];
            let verdicts = Report::of(&rounds).targets();
            assert_eq!(verdicts.len(), 2);
            verdicts.iter().map(Verdict::line).collect::<Vec<_>>()
        };
        let missed = judge(108.0, 7.7);
        assert!(missed[0].ends_with("missed by 10.0 %"), "{}", missed[0]);
        assert!(missed[1].ends_with("missed by 10.0 %"), "{}", missed[1]);
        let met = judge(120.0, 3.9);
        assert!(met[0].ends_with(" met"), "{}", met[0]);
        assert!(met[1].ends_with("met, and the goal"), "{}", met[1]);
    }

    #[test]
    fn thousands_are_set_apart() {
        assert_eq!(number(1_234_567.4, 0), "1,234,567");
        assert_eq!(number(123.456, 1), "123.5");
        assert_eq!(number(0.4, 2), "0.40");
    }

    #[test]
    fn a_table_has_a_column_for_whoever_ran_and_a_dash_for_what_is_not_known() {
        let rounds = [
            round(1, Contender::None, Metric::Requests, 10_000.0),
            round(2, Contender::None, Metric::Requests, 12_000.0),
            round(1, Contender::Haproxy, Metric::RequestCpu, 23.0),
        ];
        let text = Report::of(&rounds).tables();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 5, "{text}");
        assert!(lines[0].contains("no mesh") && lines[0].contains("haproxy TCP + mTLS"));
        assert!(!text.contains("nginx"), "{text}");
        assert!(lines[2].contains("11,000 (10,000–12,000) |"), "{text}");
        assert!(lines[2].contains("– |"), "{text}");
        let width = lines[0].chars().count();
        assert!(lines[..4].iter().all(|l| l.chars().count() == width));
    }
}
