// Runs before anything is painted, so that a dark page never flashes white. Mantine keeps its choice under this key.
(function () {
  const key = "mantine-color-scheme-value";
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  function stored() {
    try { return localStorage.getItem(key); } catch (error) { return null; }
  }
  const choice = stored();
  const scheme = choice === "dark" || choice === "light" ? choice : dark.matches ? "dark" : "light";
  document.documentElement.setAttribute("data-mantine-color-scheme", scheme);
})();
