// Names and keyboard access that the theme leaves out: regions that scroll, the search, the buttons beside programs.
const mend = () => {
  document.querySelectorAll(".md-typeset__scrollwrap").forEach((region) => { region.tabIndex = 0; });
  document.querySelectorAll(".md-search").forEach((dialog) => { dialog.ariaLabel = "Search"; });
  document.querySelectorAll(".md-code__nav").forEach((place, n) => { place.ariaLabel = `Program ${n + 1}`; });
};
new MutationObserver(mend).observe(document.body, { childList: true, subtree: true });
mend();
