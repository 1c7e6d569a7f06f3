import { defineConfig } from 'vitest/config'

export default defineConfig({
  test: {
    include: ['{protocol,tpm2,server,device-agent,firmware-sim,cli,demo,test,bench}/**/*.test.ts'],
    setupFiles: ['test/seed.ts'],
    pool: 'forks',
    maxWorkers: 2,
    maxConcurrency: 2,
    testTimeout: 60_000,
    hookTimeout: 60_000,
    teardownTimeout: 10_000,
  },
})
