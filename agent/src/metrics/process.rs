//! `process_*` and `proxy_build_info`: the process as the kernel sees it.

use std::{fs, sync::OnceLock};

use nix::unistd::{SysconfVar, sysconf};

use super::expose::{Family, Kind, Sample};

/// What cannot be read is left out.
pub(super) fn families() -> Vec<Family> {
    let mut families = vec![Family {
        name: "proxy_build_info",
        help: "Version of the proxy; always 1.",
        kind: Kind::Gauge,
        samples: vec![Sample {
            labels: vec![
                ("version", env!("CARGO_PKG_VERSION").into()),
                ("vendor", "picomesh".into()),
            ],
            value: 1.0,
        }],
    }];
    let mut add = |name, help, kind, value: Option<f64>| {
        families.extend(value.map(|value| Family::single(name, help, kind, value)));
    };
    let stat = fs::read_to_string("/proc/self/stat").ok();
    let stat = stat.as_deref().and_then(Stat::parse);
    let ticks = system(SysconfVar::CLK_TCK).unwrap_or(100.0);
    add(
        "process_start_time_seconds",
        "Start of the process, seconds since the epoch.",
        Kind::Gauge,
        start_time(stat.as_ref(), ticks),
    );
    add(
        "process_cpu_seconds_total",
        "CPU time used, user and system.",
        Kind::Counter,
        stat.as_ref().map(|stat| stat.cpu_ticks / ticks),
    );
    add(
        "process_threads",
        "Threads of the process.",
        Kind::Gauge,
        stat.as_ref().map(|stat| stat.threads),
    );
    add(
        "process_virtual_memory_bytes",
        "Virtual memory.",
        Kind::Gauge,
        stat.as_ref().map(|stat| stat.virtual_bytes),
    );
    add(
        "process_resident_memory_bytes",
        "Resident memory.",
        Kind::Gauge,
        stat.as_ref()
            .and_then(|stat| Some(stat.resident_pages * system(SysconfVar::PAGE_SIZE)?)),
    );
    add(
        "process_open_fds",
        "Open file descriptors.",
        Kind::Gauge,
        fs::read_dir("/proc/self/fd")
            .ok()
            .map(|entries| entries.count() as f64),
    );
    add(
        "process_max_fds",
        "File descriptors the process may open.",
        Kind::Gauge,
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)
            .ok()
            .map(|(soft, _)| soft as f64),
    );
    families
}

/// Fields of /proc/self/stat.
struct Stat {
    cpu_ticks: f64,
    threads: f64,
    start_ticks: f64,
    virtual_bytes: f64,
    resident_pages: f64,
}

impl Stat {
    fn parse(line: &str) -> Option<Self> {
        // The name is in parentheses and may hold anything, also parentheses. Field 3 follows it.
        let (_, rest) = line.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
        let number = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
        Some(Self {
            cpu_ticks: number(14)? + number(15)?,
            threads: number(20)?,
            start_ticks: number(22)?,
            virtual_bytes: number(23)?,
            resident_pages: number(24)?,
        })
    }
}

fn system(variable: SysconfVar) -> Option<f64> {
    sysconf(variable).ok().flatten().map(|value| value as f64)
}

/// Computed once: boot time is derived from the clock, and must not wander between scrapes.
fn start_time(stat: Option<&Stat>, ticks: f64) -> Option<f64> {
    static START: OnceLock<Option<f64>> = OnceLock::new();
    *START.get_or_init(|| {
        let boot = fs::read_to_string("/proc/stat").ok()?;
        let boot: f64 = boot
            .lines()
            .find_map(|line| line.strip_prefix("btime "))?
            .trim()
            .parse()
            .ok()?;
        Some(boot + stat?.start_ticks / ticks)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_with_spaces_and_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a b) c) S 1 2 3 4 5 6 7 8 9 10 100 50 0 0 20 0 3 0 777 4096 12 99";
        let stat = Stat::parse(stat).unwrap();
        assert_eq!(stat.cpu_ticks, 150.0);
        assert_eq!(stat.threads, 3.0);
        assert_eq!(stat.start_ticks, 777.0);
        assert_eq!(stat.virtual_bytes, 4096.0);
        assert_eq!(stat.resident_pages, 12.0);
    }

    #[test]
    fn the_process_describes_itself() {
        let families = families();
        let value = |name: &str| {
            let family = families.iter().find(|family| family.name == name);
            family.unwrap().samples[0].value
        };
        assert!(value("process_resident_memory_bytes") > 100_000.0);
        assert!(value("process_open_fds") >= 3.0);
        assert!(value("process_threads") >= 1.0);
        assert!(value("process_start_time_seconds") > 1_600_000_000.0);
    }
}
