"""Reports: report.json is the only source; everything else is drawn from it."""
