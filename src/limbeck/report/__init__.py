"""Reports: what a run gave (`summary`), as one HTML page (`html`), side by side (`compare`), and in the terminal (`console`)."""
