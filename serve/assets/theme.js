// Bootstrap takes dark or light from an attribute. No module, which would run after the first paint: the page is never
// seen in the other one.
const dark = matchMedia("(prefers-color-scheme: dark)");
const paintTheme = () => document.documentElement.setAttribute("data-bs-theme", dark.matches ? "dark" : "light");
dark.addEventListener("change", paintTheme);
paintTheme();
