# rounds.R ROUNDS ADDRESS...: runs on the first guest. Workers are started on the others with snow, over SSH, and give answers
# over sockets. In each round all draw numbers and get those of the round before; a line of /srv/rounds is a round.
library(snow)

words <- commandArgs(TRUE)
rounds <- as.integer(words[1])
hosts <- words[-1]
cluster <- makeSOCKcluster(hosts, master = "10.1.0.1", port = 11000L, outfile = "/run/worker.log",
                           rshcmd = Sys.getenv("RSH"), rscript = "/run/rscript")
invisible(clusterApply(cluster, seq_along(hosts), set.seed))

# The generator of random numbers is in the memory of its worker, which goes on where it was in the round before.
draw <- function(carried) {
  drawn <- rnorm(length(carried)) + carried
  list(drawn = drawn / 2, size = sqrt(sum(crossprod(matrix(drawn, ncol = 50))^2)))
}

carried <- numeric(5000)
for (round in seq_len(rounds)) {
  answers <- clusterCall(cluster, draw, carried)
  carried <- Reduce(`+`, lapply(answers, `[[`, "drawn")) / length(hosts)
  sizes <- vapply(answers, `[[`, 0, "size")
  cat(round, sprintf("%.15g", c(sum(carried), sizes)), "\n", file = "/srv/rounds", append = TRUE)
}
stopCluster(cluster)
