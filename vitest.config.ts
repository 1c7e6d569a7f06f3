import { BaseSequencer, type TestSpecification } from 'vitest/node'
import { defineConfig } from 'vitest/config'

/** Files that take minutes, longest first: begun last, they would keep one worker busy while the other has nothing left to do. */
const longest = [
  'test/rollover.test.ts',
  'test/rollover-fleet.test.ts',
  'test/rollover-kill.test.ts',
  'test/simulation.test.ts',
  'test/kill-matrix.test.ts',
  'test/software-tpm-mutations.test.ts',
  'test/mutations.test.ts',
  'test/hostile-broker.test.ts',
]

class LongestFirst extends BaseSequencer {
  override async sort(files: TestSpecification[]): Promise<TestSpecification[]> {
    const rank = ({ moduleId }: TestSpecification): number => {
      const at = longest.findIndex((path) => moduleId.endsWith(path))
      return at === -1 ? longest.length : at
    }
    return (await super.sort(files)).toSorted((one, other) => rank(one) - rank(other))
  }
}

export default defineConfig({
  test: {
    include: ['{protocol,tpm2,server,device-agent,firmware-sim,cli,demo,test,bench}/**/*.test.ts'],
    globalSetup: ['test/temporary.ts'],
    setupFiles: ['test/seed.ts'],
    sequence: { sequencer: LongestFirst },
    pool: 'forks',
    // Fleets of ten thousand boards in one process: a garbage collector that waits may need more than Node gives it by itself, which depends on the machine.
    execArgv: process.env['FLEETKEY_LONG'] === '1' ? ['--max-old-space-size=8192'] : [],
    maxWorkers: 2,
    // The concurrent tests are processes that wait for one another more than they compute.
    maxConcurrency: 4,
    testTimeout: 60_000,
    hookTimeout: 60_000,
    teardownTimeout: 10_000,
  },
})
