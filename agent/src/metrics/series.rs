//! Label sets and the counters behind them: one [`Series`] per label set, one cell in it per data
//! thread, a bounded [`Table`] of them per kind of counter.
//!
//! A data thread finds its series once per flow and keeps it; from then on counting is an atomic
//! add to a cell that no other core writes. Table locks are taken when a label set is seen for the
//! first time, by a scrape, and by the sweep that retires what is idle or gone.
//!
//! Retiring must not lose a count, and a lock per flow is too dear. So a thread announces itself in
//! `users` before it looks at `retired`, and the sweep sets `retired` before it looks at `users`;
//! both are sequentially consistent, hence one of the two sees the other. Who comes too late takes
//! the slow way through the table, whose lock the sweep holds.

use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering},
    },
};

use parking_lot::Mutex;

use crate::state::PodUid;

/// Names and values in the order in which they are shown.
pub(super) type Labels = Arc<[(&'static str, Arc<str>)]>;

/// Counters of one label set.
#[derive(Debug)]
pub(super) struct Series<C> {
    pub(super) labels: Labels,
    /// The local pod it belongs to; the series goes with it.
    pod: Option<PodUid>,
    cells: Box<[Slot<C>]>,
    /// No longer in the table; nobody may count into it.
    retired: AtomicBool,
    /// Seconds since the process' metrics began, when last used.
    touched: AtomicU64,
}

/// On a cache line of its own: neighbours belong to other cores.
#[repr(align(64))]
#[derive(Debug, Default)]
struct Slot<C> {
    /// Flows and calls of this thread that hold the series.
    users: AtomicI64,
    cell: C,
}

impl<C: Default> Series<C> {
    fn new(labels: Labels, pod: Option<PodUid>, threads: usize) -> Self {
        Self {
            labels,
            pod,
            cells: (0..threads).map(|_| Slot::default()).collect(),
            retired: AtomicBool::new(false),
            touched: AtomicU64::new(0),
        }
    }

    /// Announces a user. `false`: retired meanwhile, ask the table again.
    pub(super) fn enter(&self, thread: usize, now: u64) -> bool {
        self.cells[thread].users.fetch_add(1, Ordering::SeqCst);
        if self.retired.load(Ordering::SeqCst) {
            self.cells[thread].users.fetch_sub(1, Ordering::SeqCst);
            return false;
        }
        self.touched.store(now, Ordering::Relaxed);
        true
    }

    pub(super) fn leave(&self, thread: usize, now: u64) {
        self.touched.store(now, Ordering::Relaxed);
        self.cells[thread].users.fetch_sub(1, Ordering::SeqCst);
    }

    pub(super) fn cell(&self, thread: usize) -> &C {
        &self.cells[thread].cell
    }

    pub(super) fn cells(&self) -> impl Iterator<Item = &C> {
        self.cells.iter().map(|slot| &slot.cell)
    }

    fn in_use(&self) -> bool {
        self.cells
            .iter()
            .any(|slot| slot.users.load(Ordering::SeqCst) > 0)
    }
}

/// How many label sets the process may hold, over all tables.
#[derive(Debug)]
pub(super) struct Budget {
    pub(super) max: usize,
    pub(super) used: AtomicUsize,
    /// Times that a new label set was counted in an overflow series instead.
    pub(super) dropped: AtomicU64,
}

impl Budget {
    pub(super) fn new(max: usize) -> Self {
        Self {
            max,
            used: AtomicUsize::new(0),
            dropped: AtomicU64::new(0),
        }
    }

    /// What one pod may hold of it, so that a port scanner costs only its own pod the detail.
    fn per_pod(&self) -> usize {
        (self.max / 10).max(1)
    }
}

/// A label set that is wanted, and what takes its place when there is no room.
pub(super) struct Wanted<'a> {
    pub(super) labels: Labels,
    pub(super) pod: Option<&'a PodUid>,
    /// The same pod with all that varies left out.
    pub(super) pod_overflow: Labels,
    /// For everybody.
    pub(super) overflow: Labels,
}

#[derive(Debug)]
pub(super) struct Table<C> {
    threads: usize,
    budget: Arc<Budget>,
    /// Counts sweeps that removed something: caches of series drop what they hold then.
    generation: AtomicU64,
    inner: Mutex<Inner<C>>,
}

#[derive(Debug)]
struct Inner<C> {
    by_labels: HashMap<Labels, Arc<Series<C>>>,
    per_pod: HashMap<PodUid, usize>,
}

impl<C: Default> Table<C> {
    pub(super) fn new(threads: usize, budget: Arc<Budget>) -> Self {
        Self {
            threads,
            budget,
            generation: AtomicU64::new(0),
            inner: Mutex::new(Inner {
                by_labels: HashMap::new(),
                per_pod: HashMap::new(),
            }),
        }
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Relaxed)
    }

    /// The series of a label set, entered already by `thread`.
    pub(super) fn enter(&self, wanted: Wanted<'_>, thread: usize, now: u64) -> Arc<Series<C>> {
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        if let Some(series) = inner.by_labels.get(&wanted.labels) {
            return entered(series, thread, now);
        }
        let held = wanted
            .pod
            .and_then(|pod| inner.per_pod.get(pod))
            .copied()
            .unwrap_or(0);
        let used = self.budget.used.load(Ordering::Relaxed);
        let labels = if used < self.budget.max && held < self.budget.per_pod() {
            wanted.labels
        } else {
            self.budget.dropped.fetch_add(1, Ordering::Relaxed);
            // Pods are few (the kernel half has a slot for each), so that this stays bounded; the
            // last resort is there for what belongs to no pod.
            match wanted.pod {
                Some(_) if used < self.budget.max.saturating_mul(2) => wanted.pod_overflow,
                Some(_) | None => wanted.overflow,
            }
        };
        if let Some(series) = inner.by_labels.get(&labels) {
            return entered(series, thread, now);
        }
        let series = Arc::new(Series::new(
            labels.clone(),
            wanted.pod.cloned(),
            self.threads,
        ));
        let series = entered(&series, thread, now);
        inner.by_labels.insert(labels, series.clone());
        if let Some(pod) = wanted.pod {
            *inner.per_pod.entry(pod.clone()).or_default() += 1;
        }
        self.budget.used.fetch_add(1, Ordering::Relaxed);
        series
    }

    /// All series of this moment; counting goes on while the caller reads them.
    pub(super) fn snapshot(&self) -> Vec<Arc<Series<C>>> {
        self.inner.lock().by_labels.values().cloned().collect()
    }

    /// Retires what nobody uses: series of pods that are gone at once, others after `idle` seconds.
    pub(super) fn sweep(&self, live: &HashSet<PodUid>, now: u64, idle: u64) {
        let mut inner = self.inner.lock();
        let inner = &mut *inner;
        let before = inner.by_labels.len();
        inner.by_labels.retain(|_, series| {
            let gone = series.pod.as_ref().is_some_and(|pod| !live.contains(pod));
            let idle = now.saturating_sub(series.touched.load(Ordering::Relaxed)) >= idle;
            if !gone && !idle {
                return true;
            }
            series.retired.store(true, Ordering::SeqCst);
            if series.in_use() {
                series.retired.store(false, Ordering::SeqCst);
                return true;
            }
            if let Some(held) = series.pod.as_ref().and_then(|p| inner.per_pod.get_mut(p)) {
                *held -= 1;
            }
            false
        });
        inner.per_pod.retain(|_, held| *held > 0);
        let removed = before - inner.by_labels.len();
        if removed > 0 {
            self.budget.used.fetch_sub(removed, Ordering::Relaxed);
            self.generation.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Enters a series of the table while its lock is held, so that no sweep can retire it meanwhile: in
/// the table there are none that are retired.
fn entered<C: Default>(series: &Arc<Series<C>>, thread: usize, now: u64) -> Arc<Series<C>> {
    let entered = series.enter(thread, now);
    debug_assert!(entered, "a series in the table is never retired");
    series.clone()
}

/// A connection's counters, per label set and thread.
#[derive(Debug, Default)]
pub(super) struct TcpCell {
    pub(super) opened: AtomicU64,
    pub(super) succeeded: AtomicU64,
    pub(super) read: AtomicU64,
    pub(super) written: AtomicU64,
    /// By the failure's word; there are a dozen of them, and few in one series.
    failures: Mutex<Vec<(&'static str, u64)>>,
}

impl TcpCell {
    pub(super) fn fail(&self, word: &'static str) {
        let mut failures = self.failures.lock();
        match failures.iter_mut().find(|(known, _)| *known == word) {
            Some((_, count)) => *count += 1,
            None => failures.push((word, 1)),
        }
    }

    pub(super) fn failures(&self) -> Vec<(&'static str, u64)> {
        self.failures.lock().clone()
    }
}

/// One counter, per label set and thread.
#[derive(Debug, Default)]
pub(super) struct CountCell(pub(super) AtomicU64);

/// Upper bounds of `tcp_connection_duration_ms`, in milliseconds; dashboards know these.
pub(super) const BOUNDS_MS: [u64; 25] = [
    1, 2, 3, 4, 5, 10, 20, 30, 40, 50, 100, 200, 300, 400, 500, 1_000, 2_000, 3_000, 4_000, 5_000,
    10_000, 20_000, 30_000, 40_000, 50_000,
];

/// A histogram of durations, per label set and thread.
#[derive(Debug, Default)]
pub(super) struct DurationCell {
    /// Per bound, not cumulative; the last one is what is longer than all.
    pub(super) buckets: [AtomicU64; BOUNDS_MS.len() + 1],
    pub(super) sum_us: AtomicU64,
}

impl DurationCell {
    pub(super) fn observe(&self, duration: std::time::Duration) {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let place = BOUNDS_MS.partition_point(|bound| bound.saturating_mul(1_000) < micros);
        self.buckets[place].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(micros, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn labels(value: &str) -> Labels {
        Arc::from([("pod", Arc::from(value))])
    }

    fn table(max: usize) -> Table<CountCell> {
        Table::new(2, Arc::new(Budget::new(max)))
    }

    fn wanted<'a>(value: &str, pod: Option<&'a PodUid>) -> Wanted<'a> {
        Wanted {
            labels: labels(value),
            pod,
            pod_overflow: labels(&format!("overflow of {}", pod.map_or("", |p| p))),
            overflow: labels("overflow"),
        }
    }

    fn names(table: &Table<CountCell>) -> Vec<String> {
        let mut names: Vec<_> = table
            .snapshot()
            .iter()
            .map(|series| series.labels[0].1.to_string())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_label_set_has_one_series_for_all_threads() {
        let table = table(100);
        let first = table.enter(wanted("a", None), 0, 0);
        let second = table.enter(wanted("a", None), 1, 0);
        first.cell(0).0.fetch_add(3, Ordering::Relaxed);
        second.cell(1).0.fetch_add(4, Ordering::Relaxed);
        let all = table.snapshot();
        assert_eq!(all.len(), 1);
        let sum: u64 = all[0].cells().map(|c| c.0.load(Ordering::Relaxed)).sum();
        assert_eq!(sum, 7);
    }

    #[test]
    fn an_idle_series_goes_after_its_time_and_not_while_it_is_used() {
        let table = table(100);
        let used = table.enter(wanted("used", None), 0, 0);
        let idle = table.enter(wanted("idle", None), 0, 0);
        idle.leave(0, 10);
        table.sweep(&HashSet::new(), 609, 600);
        assert_eq!(names(&table), ["idle", "used"]);
        table.sweep(&HashSet::new(), 610, 600);
        assert_eq!(names(&table), ["used"]);
        used.leave(0, 611);
        table.sweep(&HashSet::new(), 1_211, 600);
        assert_eq!(names(&table), Vec::<String>::new());
    }

    #[test]
    fn a_gone_pod_takes_its_series_along_after_its_last_flow() {
        let table = table(100);
        let pod: PodUid = Arc::from("uid");
        let series = table.enter(wanted("a", Some(&pod)), 0, 0);
        table.sweep(&HashSet::from([pod.clone()]), 1, 600);
        table.sweep(&HashSet::new(), 1, 600);
        assert_eq!(names(&table), ["a"], "a flow is open");
        series.leave(0, 1);
        table.sweep(&HashSet::from([pod]), 1, 600);
        assert_eq!(names(&table), ["a"], "the pod is there");
        table.sweep(&HashSet::new(), 1, 600);
        assert_eq!(names(&table), Vec::<String>::new());
    }

    #[test]
    fn nobody_enters_a_retired_series_and_the_table_makes_a_new_one() {
        let table = table(100);
        let series = table.enter(wanted("a", None), 0, 0);
        series.leave(0, 0);
        let before = table.generation();
        table.sweep(&HashSet::new(), 600, 600);
        assert!(!series.enter(0, 600));
        assert!(!series.in_use(), "a refused user must not stay behind");
        assert_ne!(table.generation(), before, "caches must learn of it");
        let again = table.enter(wanted("a", None), 0, 600);
        assert!(!Arc::ptr_eq(&series, &again));
    }

    #[test]
    fn beyond_the_bound_label_sets_share_an_overflow_series() {
        let table = table(3);
        for name in ["a", "b", "c", "d", "e"] {
            table.enter(wanted(name, None), 0, 0);
        }
        assert_eq!(names(&table), ["a", "b", "c", "overflow"]);
        assert_eq!(table.budget.dropped.load(Ordering::Relaxed), 2);
        // What is known already is found, full or not.
        table.enter(wanted("a", None), 0, 0);
        assert_eq!(table.budget.dropped.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn one_pod_cannot_take_the_room_of_the_others() {
        let table = table(20);
        let (greedy, modest): (PodUid, PodUid) = (Arc::from("greedy"), Arc::from("modest"));
        for n in 0..50 {
            table.enter(wanted(&format!("greedy {n:02}"), Some(&greedy)), 0, 0);
        }
        table.enter(wanted("modest", Some(&modest)), 0, 0);
        assert_eq!(
            names(&table),
            ["greedy 00", "greedy 01", "modest", "overflow of greedy"]
        );
    }

    #[test]
    fn sweeping_while_others_count_loses_nothing() {
        let table = Arc::new(table(100));
        let stop = Arc::new(AtomicBool::new(false));
        let workers: Vec<_> = (0..2)
            .map(|thread| {
                let (table, stop) = (table.clone(), stop.clone());
                std::thread::spawn(move || {
                    let mut cached = table.enter(wanted("a", None), thread, 0);
                    cached.leave(thread, 0);
                    let mut lost = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        if !cached.enter(thread, 0) {
                            cached = table.enter(wanted("a", None), thread, 0);
                        }
                        // While a user is inside, the table must know the series.
                        let known = table.snapshot().iter().any(|s| Arc::ptr_eq(s, &cached));
                        lost += u64::from(!known);
                        cached.leave(thread, 0);
                    }
                    lost
                })
            })
            .collect();
        for _ in 0..5_000 {
            table.sweep(&HashSet::new(), 1_000, 600);
        }
        stop.store(true, Ordering::Relaxed);
        for worker in workers {
            assert_eq!(worker.join().unwrap(), 0);
        }
    }

    #[test]
    fn a_duration_falls_into_the_bucket_of_its_upper_bound() {
        let cell = DurationCell::default();
        for micros in [1, 1_000, 1_001, 50_000_000, 50_000_001] {
            cell.observe(Duration::from_micros(micros));
        }
        let counts: Vec<u64> = cell
            .buckets
            .iter()
            .map(|b| b.load(Ordering::Relaxed))
            .collect();
        assert_eq!((counts[0], counts[1]), (2, 1));
        assert_eq!((counts[24], counts[25]), (1, 1));
        assert_eq!(counts.iter().sum::<u64>(), 5);
    }
}
