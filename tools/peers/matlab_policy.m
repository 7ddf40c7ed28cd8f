% Time of the authors' PILCO code (MATLAB, under Octave): a row of tools/peers/table.py.
%
%     git clone https://github.com/UCL-SML/pilco-matlab
%     octave-cli tools/peers/matlab_policy.m pilco-matlab [repeats]
%
% The expected cost of a policy and its gradient, as `python pilco.py --benchmark` times them: their
% value.m with 4 states, 1 action, 40 steps, 10 centers, and GPs of 100 and 300 points.

1;  % a script, not a function file

function main(repository, repeats)
  for folder = {"base", "control", "gp", "loss", "util"}
    addpath(fullfile(repository, folder{1}));
  end
  copy = tempname();  % `do`, a variable of sliceModel in propagated.m, is a keyword in Octave
  mkdir(copy);
  text = fileread(fullfile(repository, "base", "propagated.m"));
  file = fopen(fullfile(copy, "propagated.m"), "w");
  fputs(file, regexprep(text, '\<do\>', 'outputs'));
  fclose(file);
  addpath(copy);
  plant = struct("angi", [], "poli", 1:4, "dyni", 1:4, "difi", 1:4, "prop", @propagated);
  policy = struct("fcn", @(policy, m, s) conCat(@congp, @gSat, policy, m, s), "maxU", 1);
  policy.p = struct("hyp", [zeros(5, 1); log(0.01)], "inputs", 0.1 * randn(10, 4));
  policy.p.targets = 0.1 * randn(10, 1);
  cost = struct("fcn", @lossSat, "gamma", 1, "z", zeros(4, 1), "W", eye(4));
  for points = [100, 300]
    x = randn(points, 5);
    y = 0.1 * sin(x * randn(5, 4)) + 0.002 * randn(points, 4);
    hyp = [log(rand(5, 4) + 1.5); -1.6 * ones(1, 4); -5.3 * ones(1, 4)];
    model = struct("fcn", @gp0d, "inputs", x, "targets", y, "hyp", hyp);
    seconds = zeros(1, repeats);
    for i = 1:repeats
      start = tic;
      [total, gradient] = value(policy.p, zeros(4, 1), 0.01 * eye(4), model, policy, plant, cost, 40);
      seconds(i) = toc(start);
    end
    assert(all(isfinite(unwrap(gradient))));
    printf("%10.1f ms      %d points: Octave %s\n", 1e3 * median(seconds), points, version());
  end
end

main(argv(){1}, str2double([argv(){2:end}, "10"](1:2)));
